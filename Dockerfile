# The command improved-diffusion in an image. Without a GPU, the CPU build of torch saves gigabytes:
#
#   docker build -t improved-diffusion .
#   docker build -t improved-diffusion --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#
# `--target service` adds what `serve` and `web` need: a port and a health check.

ARG PYTHON_IMAGE=python:3.12-slim-bookworm

# The names of the packages alone, so that a change elsewhere in pyproject.toml installs none of them again.
FROM ${PYTHON_IMAGE} AS requirements
WORKDIR /build
ARG EXTRAS=mpi,yaml,eval,safetensors,tensorboard,serve,web
COPY pyproject.toml containers/requirements.py ./
RUN python3 requirements.py "${EXTRAS}" > requirements.txt

FROM ${PYTHON_IMAGE} AS packages
WORKDIR /build
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt .
# torch first, so that no other package chooses a different build of it.
ARG TORCH_INDEX=https://pypi.org/simple
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt --index-url "${TORCH_INDEX}" \
        --extra-index-url https://pypi.org/simple "torch==$(sed -n 's/^torch==//p' constraints.txt)"
COPY --from=requirements /build/requirements.txt .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt --requirement requirements.txt

FROM packages AS wheel
COPY pyproject.toml setup.py README.md LICENSE ./
COPY improved_diffusion improved_diffusion
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /wheels .

FROM ${PYTHON_IMAGE} AS commands
# Any other user (`docker run --user`) may write to the home too: caches, and the list of trusted feature networks.
RUN useradd --uid 1000 --create-home diffusion && chmod 1777 /home/diffusion \
    && install -d -o diffusion -g diffusion /project /project/runs /project/data
COPY --from=packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HOME=/home/diffusion PYTHONUNBUFFERED=1
# A layer of its own, so that a new version is a download of a megabyte.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-deps --no-cache-dir --no-index /wheels/*.whl
USER 1000:1000
# Paths are those of the documentation: data/photos is read, runs/photos is written.
WORKDIR /project
VOLUME ["/project/runs", "/project/data"]
ENTRYPOINT ["improved-diffusion"]
CMD ["--help"]
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="improved_diffusion" \
      org.opencontainers.image.description="Train pixel-space diffusion models on your own images and sample from them" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="MIT"

FROM commands AS service
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["serve", "--runs", "runs", "--host", "0.0.0.0", "--port", "8000"]

# What `docker build` makes unless it is told a target.
FROM commands
