"""`python -m launch` is `vitrail`."""

from launch.cli import main

if __name__ == "__main__":
    main()
