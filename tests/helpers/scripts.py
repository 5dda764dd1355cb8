"""Scripts in forked children of the test process, which need no start-up."""
import os
import resource
import sys
import threading

from tqdm import tqdm

import convert_to_trec_results
import distill
import general_distill
import prepare_examples
import report
import reranker
import tokenize_to_features
from simplified_tinybert.common.files import run_main

SCRIPTS = {module.__name__: module for module in (convert_to_trec_results, distill, general_distill, prepare_examples,
                                                  report, reranker, tokenize_to_features)}


def forked(script, call, log, file_limit=None):
    """Run a script's main in a forked child, with its output in `log` and files of at most `file_limit` bytes.

    Returns the process id.
    """
    child = os.fork()
    if child:
        return child
    code = 70                                           # of an uncaught exception, which is printed to the log
    try:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of the tokenizers library do not survive a fork
        tqdm.set_lock(threading.RLock())                # the inherited lock may be held by a child that was killed
        log_file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log_file, 1)
        os.dup2(log_file, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        sys.argv = [f"{script}.py", *map(str, call)]
        run_main(SCRIPTS[script].main)
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        print(f"uncaught: {error!r}", file=sys.stderr)
    finally:
        os._exit(code)
