"""What every operator shares: argument checks and the description of packed documents."""
