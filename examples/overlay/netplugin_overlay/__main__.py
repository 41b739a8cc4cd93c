from netplugin_overlay.driver import OverlayDriver
from netplugin_sdk import run


def main() -> None:
    """Serve the driver until SIGTERM."""
    run(
        OverlayDriver,
        name="netplugin-overlay",
        description="Docker network driver: one network over all nodes of a swarm.",
    )


if __name__ == "__main__":
    main()
