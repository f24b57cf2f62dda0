"""Execute blocks of Python in one namespace: each line of stdin holds one as JSON, `{"code": ..., "name": ...}`.

After each block, DONE is printed. A block that fails prints its traceback and ends the program.
"""

import json
import sys

DONE = "\x00done"

if __name__ == "__main__":
    sys.path[0] = ""  # as in an interpreter, not the folder of this file
    namespace = {"__name__": "__main__"}
    for line in sys.stdin:
        block = json.loads(line)
        exec(compile(block["code"], block["name"], "exec"), namespace)
        print(DONE, flush=True)
