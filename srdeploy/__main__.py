"""`python -m srdeploy` is the `srdeploy` command."""

from srdeploy.cli.main import main

if __name__ == "__main__":
    main()
