import os, pathlib, sys
os.environ['CUDA_VISIBLE_DEVICES'] = ''         # tests compare bit for bit, and hand over CPU tensors
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
