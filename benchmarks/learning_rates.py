"""Which learning rate should each method have by default?

Adapts a ViT with each method at a few rates, on a few hundred real images at half the side, so that
a CPU gets through all of it, and prints the AUROC on images that were not trained on.

    python benchmarks/learning_rates.py --data DIR --weights FILE.safetensors --out out.json

`DIR` holds `labels.csv` (`file,label[,patient]`); splits keep patients together. The head has a
rate of its own, the same for all. Rows are appended to the output as they finish; rows that are
there already are not run again.
"""

from __future__ import annotations

import copy
import json
import time

import torch
from defaults import arguments, auc_macro, read_set, split, train

import wara
from wara.adapters import METHODS
from wara.backbones import build_backbone
from wara.images import load_tensor

# A factor of about three apart, around what each method's arithmetic suggests.
RATES: dict[str, list[float]] = {
    "lora": [7e-4, 2e-3, 6e-3, 2e-2],
    "wara": [7e-4, 2e-3, 6e-3, 2e-2],
    "tiny_wara": [5e-3, 1.5e-2, 5e-2, 1.5e-1],
    "waveft": [2e-4, 6e-4, 2e-3, 6e-3],
    "shira": [5e-3, 1.5e-2, 5e-2, 1.5e-1],
    "dora": [7e-4, 2e-3, 6e-3, 2e-2],
    "adalora": [2e-3, 6e-3, 2e-2, 6e-2],
    "vera": [5e-3, 1.5e-2, 5e-2, 1.5e-1],
    "loha": [7e-4, 2e-3, 6e-3, 2e-2],
    "lokr": [7e-4, 2e-3, 6e-3, 2e-2, 6e-2],
    "fourierft": [1.5e-2, 5e-2, 1.5e-1, 5e-1],
    "bitfit": [6e-4, 2e-3, 6e-3, 2e-2],
    "ln_tuning": [6e-4, 2e-3, 6e-3, 2e-2, 6e-2],
    "full": [3e-5, 1e-4, 3e-4, 1e-3],
    "linear_probe": [0.0],
}


def main() -> None:
    """Run the experiment."""
    parser = arguments(__doc__.splitlines()[0], train=256, epochs=8)
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--rates", type=float, nargs="+", help="in place of those of the script")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--size", type=int, default=112)
    args = parser.parse_args()
    files, labels, patients = read_set(args.data)
    count = int(labels.max()) + 1
    base, info = build_backbone(
        args.backbone, num_classes=count, img_size=args.size, weights=args.weights
    )
    base.eval()
    images = torch.stack([load_tensor(file, info.spec) for file in files])
    setting = {key: getattr(args, key) for key in ("backbone", "size", "epochs", "batch", "bf16")}
    done = json.loads(args.out.read_text()) if args.out.exists() else []
    for seed in args.seeds:
        chosen, test = split(labels, patients, seed, args.train)
        for name in args.methods:
            for rate in args.rates or RATES[name]:
                key = {"data": args.data.name, **setting, "n_train": len(chosen)}
                key |= {"seed": seed, "method": name, "lr": rate}
                if any(all(row[k] == v for k, v in key.items()) for row in done):
                    continue
                torch.manual_seed(seed)
                model = copy.deepcopy(base)
                model.reset_classifier(count)
                wara.adapt(model, METHODS[name]())
                model.train()
                torch.manual_seed(seed)
                start = time.perf_counter()
                # Of Tiny-WaRA, which trains nothing but cores, the rate in question is theirs.
                core = rate if name == "tiny_wara" else METHODS["wara"].rates["core"]
                known = torch.from_numpy(labels[chosen])
                loss = train(model, model, images[chosen], known, lr=rate, lr_core=core, args=args)
                model.eval()
                row = {
                    **key,
                    "auc_macro": round(auc_macro(model, images[test], labels[test]), 5),
                    "train_loss": round(loss, 5),
                    "n_test": len(test),
                    "seconds": round(time.perf_counter() - start, 1),
                }
                done.append(row)
                args.out.write_text(json.dumps(done, indent=1) + "\n")
                print(row, flush=True)


if __name__ == "__main__":
    main()
