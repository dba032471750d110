"""Protocol 'check' of videos: what the data are, and what is wrong with them; no model, no weights."""

from collections.abc import Sequence

from jax.sharding import Mesh

from florence_jax.data.sources.video import open_videos
from florence_jax.evaluators.base import Evaluator
from florence_jax.evaluators.video_check import VideoCheck
from florence_jax.tasks.box_check import CHECKED, BoxCheckSuite

USUAL_FRAMES, USUAL_INTERVAL = 32, 2  # of a clip, unless config.video says others


class VideoCheckSuite(BoxCheckSuite):
    """Looks at `config.data.train` and `config.data.test`, each where it is given, and tells what it finds."""

    name = "video"

    def evaluators(self, mesh: Mesh) -> Sequence[Evaluator]:
        """A check of each set."""
        video = self.config.video
        span = ((video.overrides.frames or USUAL_FRAMES) - 1) * (video.interval or USUAL_INTERVAL) + 1
        given = [(name, self.config.data[name]) for name in CHECKED if self.config.data[name]]
        return [VideoCheck(open_videos(spec), name, span) for name, spec in given]
