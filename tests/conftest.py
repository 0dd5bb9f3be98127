import os, pathlib, sys
os.environ['CUDA_VISIBLE_DEVICES'] = ''         # they compare bit for bit, and hand CPU tensors to the scripts
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
