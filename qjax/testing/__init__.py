"""The property suites that qjax runs on its own formats, lowerings and passes, for those who write others.

They need hypothesis (``pip install "qjax[test]"``), which is imported when a suite is run.
"""

from qjax.testing.formats import check_format
from qjax.testing.lowering import check_lowering
from qjax.testing.passes import check_pass

__all__ = ["check_format", "check_lowering", "check_pass"]
