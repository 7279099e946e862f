import sys

if sys.argv[1:2] == ["bench"]:
    from ringref.bench import main

    sys.exit(main(sys.argv[2:]))
