"""What the commands run once their command lines are read. These modules import torch, which takes seconds."""
