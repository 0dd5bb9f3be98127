python train_adv.py --width 8 --epochs 20 --compile --loss pgd_at --seed 0
python evaluate.py runs/cifar10-resnet18-w8-pgd_at-epochs20-compile-s0/best.pt --attacks fgsm pgd pgd-trades cw autoattack --n 1000 --compile --out runs/cifar10-resnet18-w8-pgd_at-epochs20-compile-s0/best-n1000.json
python evaluate.py runs/cifar10-resnet18-w8-pgd_at-epochs20-compile-s0/last.pt --attacks fgsm pgd pgd-trades cw autoattack --no-audit --n 1000 --compile --out runs/cifar10-resnet18-w8-pgd_at-epochs20-compile-s0/last-n1000.json
