"""What the papers state, in closed form or by quadrature: control and Jensen gap, bounds, laws of blends, one step."""
