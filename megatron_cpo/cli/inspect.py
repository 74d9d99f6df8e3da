"""Look at a store of groups: its numbers, and its prefixes, candidates and trees as text.

  megatron-cpo inspect runs/groups --tokenizer-model runs/tokenizer.model
  megatron-cpo inspect runs/groups --tokenizer-model runs/tokenizer.model --group 17
  megatron-cpo inspect runs/groups --tokenizer-model runs/tokenizer.model \\
      --html runs/groups.html

The first prints a summary of all groups and the first group, the second one group alone, the third
writes one self-contained page: plots, and a sample of the groups to search. The store's manifest
knows its tokenizer by content and not by path, so say where it is; without it ids are shown.
"""

from megatron_cpo.cli.parsing import Parser, output_path
from megatron_cpo.inspection.tokenizer import add_tokenizer_arguments


def main() -> None:
    """Parse the flags; print, or write the page."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="the store, as --output-prefix of build")
    add("--group", type=int, nargs="+", default=[], metavar="N",
        help="these groups, from 0; with --html they come first")  # fmt: skip
    add("--html", type=output_path, metavar="FILE", help="write a page instead of printing")
    add("--html-groups", type=int, default=100, metavar="N",
        help="most groups in the page, evenly spaced in the store (default: 100)")  # fmt: skip
    args = add_tokenizer_arguments(parser).parse_args()

    from megatron_cpo.inspection.show import print_store, write_page

    if args.html:
        print(write_page(args.prefix, args.html, args.html_groups, args.group, args))
    else:
        print_store(args.prefix, args.group, args)
