from netplugin_dhcp.driver import DhcpDriver
from netplugin_sdk import run


def main() -> None:
    """Serve the driver until SIGTERM."""
    run(
        DhcpDriver,
        name="dhcp",
        program="netplugin-dhcp",
        description="Docker network driver: addresses from the LAN's DHCP server.",
    )


if __name__ == "__main__":
    main()
