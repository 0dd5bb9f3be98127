python train_adv.py --model resnet18 --width 8 --subset 5000 --epochs 3 --batch-size 64 --lr 0.1 --compile --loss advprop --activation hybrid --seed 0 --out runs/small/advprop-act-s0
python evaluate.py runs/small/advprop-act-s0/best.pt --n 1000 --attacks pgd --out runs/small/advprop-act-s0/pgd.json
python evaluate.py runs/small/advprop-act-s0/best.pt --n 200 --attacks autoattack --batch-size 200 --compile --activation relu --out runs/small/advprop-act-s0/autoattack.json
python evaluate.py runs/small/advprop-act-s0/best.pt --n 1000 --attacks pgd --activation relu --out runs/small/advprop-act-s0/pgd-relu.json
python evaluate.py runs/small/advprop-act-s0/best.pt --n 1000 --attacks pgd --branch aux --out runs/small/advprop-act-s0/pgd-aux.json
