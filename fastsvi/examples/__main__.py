"""List the examples."""

from fastsvi.examples import EXAMPLES

if __name__ == "__main__":
    for name, what in EXAMPLES.items():
        print(f"python -m fastsvi.examples.{name:<15} {what}")
