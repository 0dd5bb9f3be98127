python train_adv.py --model resnet18 --width 8 --subset 5000 --epochs 3 --batch-size 64 --lr 0.1 --compile --loss trades --seed 1 --out runs/small/trades-s1
python evaluate.py runs/small/trades-s1/best.pt --n 1000 --attacks pgd --out runs/small/trades-s1/pgd.json
python evaluate.py runs/small/trades-s1/best.pt --n 200 --attacks autoattack --batch-size 200 --compile --out runs/small/trades-s1/autoattack.json
