python train_adv.py --loss adaad --teacher runs/small/teacher/best.pt --model resnet18 --width 8 --subset 10000 --epochs 5 --batch-size 64 --lr 0.1 --seed 0 --out runs/small/adaad-standard-s0
