"""Docker's side of the contract: the Container Network Model."""
