from kcv2diffusers.cli import main

main()
