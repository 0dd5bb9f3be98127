python train_adv.py --model resnet18 --width 8 --subset 5000 --epochs 3 --batch-size 64 --lr 0.1 --compile --loss adaad --teacher runs/small/teacher/best.pt --seed 0 --out runs/small/adaad-standard-s0
python evaluate.py runs/small/adaad-standard-s0/best.pt --n 1000 --attacks pgd --out runs/small/adaad-standard-s0/pgd.json
python evaluate.py runs/small/adaad-standard-s0/best.pt --n 200 --attacks autoattack --batch-size 200 --compile --out runs/small/adaad-standard-s0/autoattack.json
