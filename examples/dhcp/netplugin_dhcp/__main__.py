import argparse

from netplugin_dhcp.driver import DhcpDriver
from netplugin_sdk import DriverError, serve


def main() -> None:
    """Serve the driver until SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="netplugin-dhcp", description="Docker network driver: addresses from the LAN's DHCP server."
    )
    parser.add_argument("--name", default="dhcp", help="name of the driver for docker (default: %(default)s)")
    parser.add_argument("--log-format", choices=["text", "json"], default="text", help="form of the log on stderr")
    arguments = parser.parse_args()
    try:
        serve(DhcpDriver(), name=arguments.name, log_format=arguments.log_format)
    except (DriverError, ValueError) as error:
        parser.exit(1, f"netplugin-dhcp: {error}\n")


if __name__ == "__main__":
    main()
