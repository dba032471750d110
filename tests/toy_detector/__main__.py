"""`python -m toy_detector --config=tests/toy_detector/config.py`: `florence_jax.main` that knows the toy detector."""

from absl import app

from florence_jax.command_line import parse_flags
from florence_jax.main import main
from toy_detector import register

register()
app.run(main, flags_parser=parse_flags)
