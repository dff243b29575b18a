"""`python -m trainer_fsdp_patch`."""

import sys

from trainer_fsdp_patch.cli import main

sys.exit(main())
