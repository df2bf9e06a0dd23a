from .plants import underwater, water

plant = water({"name": "fern", "water_level": 5}, 20)
print(plant, underwater(plant), "after water")
