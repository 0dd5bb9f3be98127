python train_adv.py --model resnet18 --width 8 --subset 5000 --epochs 3 --batch-size 64 --lr 0.1 --compile --loss softmax_kl --beta 0.2 --reverse --teacher runs/small/teacher/best.pt --seed 0 --out runs/small/softmax_kl-reverse-s0
python evaluate.py runs/small/softmax_kl-reverse-s0/best.pt --n 1000 --attacks pgd --out runs/small/softmax_kl-reverse-s0/pgd.json
python evaluate.py runs/small/softmax_kl-reverse-s0/best.pt --n 200 --attacks autoattack --batch-size 200 --compile --out runs/small/softmax_kl-reverse-s0/autoattack.json
