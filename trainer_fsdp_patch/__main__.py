"""`python -m trainer_fsdp_patch`, and the command `trainer-fsdp-patch`."""

import sys


def main() -> int:
    """Run the command line; Ctrl-C ends it without a traceback, also while it is still imported.

    Returns:
        The exit code.
    """
    try:
        from trainer_fsdp_patch.cli import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
