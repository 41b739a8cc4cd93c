"""What drivers do to the kernel: interfaces (`links`) and packet filtering (`firewall`).

Everything works in the network namespace of the plugin's process and can be done twice. Nothing here knows of
Docker's protocol; nothing is imported by `import netplugin_sdk`.
"""
