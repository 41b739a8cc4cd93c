from netplugin_macvlan.driver import MacvlanDriver
from netplugin_sdk import run


def main() -> None:
    """Serve the driver until SIGTERM."""
    run(
        MacvlanDriver,
        name="netplugin-macvlan",
        description="Docker network driver: containers on the LAN of a parent interface.",
    )


if __name__ == "__main__":
    main()
