"""The command line, whose ``--help`` tells what it takes."""

from netplugin_sdk import run

from {{ cookiecutter.package_name }}.driver import NAME, Driver


def main() -> None:
    """Serve the driver until SIGTERM."""
    run(
        Driver,
        name=NAME,
        description="{{ cookiecutter.description }}",
    )


if __name__ == "__main__":
    main()
