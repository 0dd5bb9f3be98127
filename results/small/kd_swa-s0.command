python train_adv.py --model resnet18 --width 8 --subset 5000 --epochs 3 --batch-size 64 --lr 0.1 --compile --loss kd_swa --teacher runs/small/pgd_at-warm-s0/best.pt --standard-teacher runs/small/teacher/best.pt --seed 0 --out runs/small/kd_swa-s0
python evaluate.py runs/small/kd_swa-s0/best.pt --n 1000 --attacks pgd --out runs/small/kd_swa-s0/pgd.json
python evaluate.py runs/small/kd_swa-s0/best.pt --n 200 --attacks autoattack --batch-size 200 --compile --out runs/small/kd_swa-s0/autoattack.json
