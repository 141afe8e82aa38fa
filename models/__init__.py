"""Pure torch: modules, losses and the flow. No I/O, no Ray, no devices."""
