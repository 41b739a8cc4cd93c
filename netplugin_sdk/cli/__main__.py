from netplugin_sdk.cli import main

main(prog_name="netplugin")
