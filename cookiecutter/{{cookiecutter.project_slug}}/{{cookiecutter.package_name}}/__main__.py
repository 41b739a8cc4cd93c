"""The command line, whose ``--help`` tells what it takes."""

import argparse

from netplugin_sdk import DriverError, serve

from {{ cookiecutter.package_name }}.driver import NAME, Driver


def main() -> None:
    """Serve the driver until SIGTERM."""
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="{{ cookiecutter.description }}",
    )
    parser.add_argument("--name", default=NAME, help="name of the driver for docker (default: %(default)s)")
    parser.add_argument("--log-format", choices=["text", "json"], default="text", help="form of the log on stderr")
    arguments = parser.parse_args()
    try:
        serve(Driver(), name=arguments.name, log_format=arguments.log_format)
    except (DriverError, ValueError) as error:
        parser.exit(1, f"{NAME}: {error}\n")


if __name__ == "__main__":
    main()
