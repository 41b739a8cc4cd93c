import argparse

from netplugin_macvlan.driver import MacvlanDriver
from netplugin_sdk import DriverError, serve


def main() -> None:
    """Serve the driver until SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="netplugin-macvlan", description="Docker network driver: containers on the LAN of a parent interface."
    )
    parser.add_argument("--name", default="netplugin-macvlan", help="name for docker (default: %(default)s)")
    parser.add_argument("--log-format", choices=["text", "json"], default="text", help="form of the log on stderr")
    arguments = parser.parse_args()
    try:
        serve(MacvlanDriver(), name=arguments.name, log_format=arguments.log_format)
    except (DriverError, ValueError) as error:
        parser.exit(1, f"netplugin-macvlan: {error}\n")


if __name__ == "__main__":
    main()
