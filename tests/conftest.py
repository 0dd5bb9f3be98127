import os
import pathlib
import sys

# The tests compare bit for bit, and hand over CPU tensors: no GPU for them. Those of test_cuda.py want one,
# and so a process of their own: pytest tests/test_cuda.py
if not any('test_cuda' in argument for argument in sys.argv):
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
