"""Copy a store of groups to object storage, from where training and inspect read it.

  megatron-cpo publish runs/groups s3://BUCKET/runs/groups

Its manifest comes last: before, there is no store. Keys, region and endpoint are those of boto3's
own settings (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL ...). Needs the extra [s3].
Killed, or the connection lost for good? The same command begins anew.
"""

from megatron_cpo.cli.parsing import Parser


def main() -> None:
    """Parse the flags, copy the store."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="the store, as --output-prefix of build")
    add("url", metavar="s3://BUCKET/PREFIX", help="what training names as --cpo-data-path")
    add("--replace", action="store_true", help="overwrite what is there: another "
        "store, or damaged objects of this one")  # fmt: skip
    args = parser.parse_args()

    from megatron_cpo.groups.publishing import publish

    done = publish(args.prefix, args.url, args.replace)
    print(f"{args.url}: {'published' if done else 'it is there already'}")
