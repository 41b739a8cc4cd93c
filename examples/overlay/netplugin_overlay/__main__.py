import argparse

from netplugin_overlay.driver import OverlayDriver
from netplugin_sdk import DriverError, serve


def main() -> None:
    """Serve the driver until SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="netplugin-overlay", description="Docker network driver: one network over all nodes of a swarm."
    )
    parser.add_argument("--name", default="netplugin-overlay", help="name for docker (default: %(default)s)")
    parser.add_argument("--log-format", choices=["text", "json"], default="text", help="form of the log on stderr")
    arguments = parser.parse_args()
    try:
        serve(OverlayDriver(), name=arguments.name, log_format=arguments.log_format)
    except (DriverError, ValueError) as error:
        parser.exit(1, f"netplugin-overlay: {error}\n")


if __name__ == "__main__":
    main()
