"""What machines and models are: profiles from public data, the roofline that joins them, placement of layers."""
