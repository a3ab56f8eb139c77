"""`python -m beamline_client` is `beamline`, also where the command is not on the path."""

import sys

from beamline_client.main import main

if __name__ == "__main__":
    sys.exit(main())
