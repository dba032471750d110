"""A worker process of Beam's own runner, started by it: says what goes wrong, not what Beam says while it starts."""

import logging
import sys

if __name__ == "__main__":
    logging.disable(logging.WARNING)  # before the import, which warns of packages for stores that are not used
    from apache_beam.runners.worker import sdk_worker_main

    logging.disable(logging.INFO)  # of Beam, before it knows the level it was told
    sdk_worker_main.main(sys.argv)
