import sys

from triton_diffusion_client.cli import main

sys.exit(main())
