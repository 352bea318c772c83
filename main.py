"""Trains, distils, samples and evaluates diffusion models: see README.md, or python main.py --helpshort."""

from diffdistill.cli import main

if __name__ == "__main__":
    main()
