from netplugin_ptp.driver import PtpDriver
from netplugin_sdk import run


def main() -> None:
    """Serve the driver until SIGTERM."""
    run(
        PtpDriver,
        name="ptp",
        program="netplugin-ptp",
        description="Docker network driver: routed containers, without a bridge.",
    )


if __name__ == "__main__":
    main()
