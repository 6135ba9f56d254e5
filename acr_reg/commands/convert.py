"""The ``convert`` command: converts a folder of class maps into another file format."""

from __future__ import annotations

import argparse
from pathlib import Path

from acr_reg.errors import CommandError
from acr_reg.integrations.convert import convert_cams
from acr_reg.integrations.formats import FORMATS
from acr_reg.integrations.formats.save import ALPHAS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.epilog = (
        "Formats: psa, {k: (H, W)} (ACR, MCTformer, SEAM, TransCAM, WeakTr, CTI); psa_crf, {0: background, k + 1: "
        "(H, W)} in two folders TARGET_LOW and TARGET_HIGH (to train PSA's AffinityNet; no CRF is run); irn, keys, cam "
        "and high_res (IRN, ToCo); clip_es, keys and attn_highres; npz, without a pickle. k is a 0-based class. Files "
        "that exist are passed over. Exit code 1: files were skipped, and named on standard error."
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of .npy or .npz files")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to write to")
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format to write")
    parser.add_argument(
        "--from", choices=FORMATS, dest="source_format", help="the format read (default: found from the file)"
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="resize the maps to the sizes of the photos DIR/ID.jpg or ID.png"
    )
    parser.add_argument(
        "--alphas", type=float, nargs=2, default=ALPHAS, metavar=("LOW", "HIGH"), help="of psa_crf (default: 4 32)"
    )
    parser.add_argument("--overwrite", action="store_true", help="convert files again that exist")


def run(args: argparse.Namespace) -> int:
    """Convert the folder. Returns 1 if a file was skipped. Errors of the user are CommandErrors."""
    try:
        report = convert_cams(
            args.source,
            args.target,
            args.to,
            args.source_format,
            images=args.images,
            alphas=tuple(args.alphas),
            overwrite=args.overwrite,
        )
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    return 1 if report.failed else 0
