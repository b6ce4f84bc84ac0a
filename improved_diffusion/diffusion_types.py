"""What the network predicts, and what it is trained on."""

import enum


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    PREVIOUS_X = enum.auto()  # x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise in x_t
    VELOCITY = enum.auto()  # v = alpha eps - sigma x_0 (Salimans & Ho 2022, app. D)


class ModelVarType(enum.Enum):
    """The variance of p(x_{t-1} | x_t). LEARNED_RANGE interpolates between the two fixed ones (IDDPM eq. 15)."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """MSE adds the bound where the variance is learned; the rescaled kinds weigh the bound as if T were 1000 (MSE) or
    sum it over all steps (KL)."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)
