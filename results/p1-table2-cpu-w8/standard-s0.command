python train_teacher.py --width 8 --epochs 20 --compile --seed 0
python evaluate.py runs/cifar10-resnet18-w8-epochs20-compile-teacher/best.pt --attacks fgsm pgd pgd-trades cw autoattack --n 1000 --compile --out runs/cifar10-resnet18-w8-epochs20-compile-teacher/best-n1000.json
python evaluate.py runs/cifar10-resnet18-w8-epochs20-compile-teacher/last.pt --attacks fgsm pgd pgd-trades cw autoattack --no-audit --n 1000 --compile --out runs/cifar10-resnet18-w8-epochs20-compile-teacher/last-n1000.json
