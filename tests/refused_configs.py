"""Starts `mlkd` with each list of words in a JSON file, in one process; what came of it is written
as JSON: [exit code, what was printed, seconds of the processor, whether torch came] each."""

import contextlib
import io
import json
import sys
import time
from pathlib import Path

from mlkd_dist import cli

found = []
for words in json.loads(Path(sys.argv[1]).read_text()):
    sys.argv[1:], printed, start = words, io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        try:
            code = cli.main()
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - start
    found.append([code, printed.getvalue(), seconds, "torch" in sys.modules])
json.dump(found, sys.stdout)
