"""Writes the embedded captioned shapes as shards of decoded images, so that training does not wait for a decoder.

python bench/decoded_shapes.py --out shards/decoded-128px --size 128
"""

import argparse
from pathlib import Path

from record import refuse

from duotone.data import captioned_shapes
from duotone.data.refusal import Refused
from duotone.data.write_shards import write_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--count", type=int, default=4096)
    asked = parser.parse_args()
    if asked.out.exists():
        refuse(f"{asked.out} exists: give another --out, nothing was written")
    try:
        write_shards(captioned_shapes.generate(asked.count, asked.size), asked.out, image_format="npy")
    except Refused as refusal:
        refuse(str(refusal))
    print(f"written: {asked.out}")


if __name__ == "__main__":
    main()
