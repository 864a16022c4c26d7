"""`python -m mamba2_dist`, which torchrun starts with `torchrun -m mamba2_dist train ...`."""

from .cli import main

if __name__ == "__main__":
    main()
