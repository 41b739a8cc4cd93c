import argparse

from netplugin_ptp.driver import PtpDriver
from netplugin_sdk import DriverError, serve


def main() -> None:
    """Serve the driver until SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="netplugin-ptp", description="Docker network driver: routed containers, without a bridge."
    )
    parser.add_argument("--name", default="ptp", help="name for docker (default: %(default)s)")
    parser.add_argument("--log-format", choices=["text", "json"], default="text", help="form of the log on stderr")
    arguments = parser.parse_args()
    try:
        serve(PtpDriver(), name=arguments.name, log_format=arguments.log_format)
    except (DriverError, ValueError) as error:
        parser.exit(1, f"netplugin-ptp: {error}\n")


if __name__ == "__main__":
    main()
